"""What a cache, pack or run is, for people and machines."""
