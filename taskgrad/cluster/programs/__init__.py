"""Programs that stay on workers: their worker's side and their driver's side."""
