"""What was received from elsewhere is data, not trust: names, paths and JSON are checked before they are used."""
