"""Speed, as ratios: each case runs this project and a peer side by side on the same model and the same work."""
