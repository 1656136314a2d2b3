"""Pushing to a stand-in for the Hub."""
