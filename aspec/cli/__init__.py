"""What can be asked at the command line? One file per command."""
