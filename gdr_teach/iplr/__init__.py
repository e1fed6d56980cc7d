"""Chapter 3, identity plus low rank: reading and writing directions of their own, and no decay; `reference` first."""
