"""`echelon plan`: profile and goal in, machines out."""
