"""Which sample and media item goes where?"""
