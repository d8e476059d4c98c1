"""A site's own report on its selection: the map of its rows, cluster scores, and the page; it never leaves the site."""
