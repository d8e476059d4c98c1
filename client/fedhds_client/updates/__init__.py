"""Finished updates on the site's disk, and the final adapter as the site keeps it."""
