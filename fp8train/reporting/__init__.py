"""What a finished or running job looks like: tables and plots from its records."""
