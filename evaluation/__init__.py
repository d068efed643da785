"""What a quantised visual cache costs in accuracy: measured, stressed, and shown."""
