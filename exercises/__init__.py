"""Fill-in exercises. Write the function, run its check, read what it says; see exercises/README.md."""
