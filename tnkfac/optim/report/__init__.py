"""What is told to the user."""
