"""Maps over streams: items go in as results come out."""
