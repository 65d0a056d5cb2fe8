"""What one objective gains over another on the runs of one study."""
