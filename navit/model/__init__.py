"""The device's side: towers over packed tokens. Never imports navit.input."""
