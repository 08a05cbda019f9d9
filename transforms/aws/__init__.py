"""AWS: the clients, and how their requests are signed and sent. Knows no step."""
