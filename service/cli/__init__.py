"""The command line, one file a group of commands. Modules are imported when their command is called."""
