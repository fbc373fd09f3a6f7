"""Online data: rows, media and mixture; no process groups here."""
