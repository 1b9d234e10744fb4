"""What does one rank do in one step?"""
