"""The dashboard at the coordinator's --http address: its HTML, CSS and scripts, and the events that it lives on."""
