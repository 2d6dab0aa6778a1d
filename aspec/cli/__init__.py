"""What can a user do at the command line? One file per command."""
