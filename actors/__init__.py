"""Where data comes from: task families, environments, collection."""
