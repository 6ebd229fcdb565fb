"""What a configuration needs, by arithmetic: no process group, no storage."""
