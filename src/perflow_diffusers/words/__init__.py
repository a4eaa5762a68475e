"""What people read of this package: objects at a prompt and in notebooks, warnings, what was passed, in words."""
