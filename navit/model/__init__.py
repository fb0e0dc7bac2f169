"""The towers over packed tokens, on the device. Never imports `navit.input`."""
