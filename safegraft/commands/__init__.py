"""Groups of commands: what the operator of a service does beside it. One file a group."""
