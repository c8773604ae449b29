"""What plait knows of peft's own methods."""
