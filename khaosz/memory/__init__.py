"""What a task will need of memory, by part, and whether it fits: before anything is loaded."""
