"""Fill-in exercises: write the function, run its check, read what it says. See README.md."""
