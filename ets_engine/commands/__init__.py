"""The commands of `ets` beside `solve`, and what all of them share."""
