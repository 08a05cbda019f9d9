"""The program: options, the chain of steps, and the rounds that run it on one machine."""
