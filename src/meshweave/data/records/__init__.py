"""What does a record mean? One file a form in which tools write conversations."""
