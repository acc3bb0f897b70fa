"""What products cost in time on a machine, and what whole models take."""
