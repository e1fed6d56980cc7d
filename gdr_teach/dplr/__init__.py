"""Chapter 5, diagonal plus low rank: free directions and a decay of every channel; `reference` first."""
