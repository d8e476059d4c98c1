"""The coordinator: it runs the rounds and never sees a row of anybody's data."""
