"""Tables and plots of a finished or running job, from the records in its run directory."""
