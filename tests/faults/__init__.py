"""The fault battery: every row of battery.json against the real process, on loopback only. `make fault` runs it."""
