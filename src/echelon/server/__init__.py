"""The wire: HTTP in the dialects that clients already speak, metrics and logs."""
