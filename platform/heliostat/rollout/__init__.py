"""Rollouts: how a new version takes over from the one that serves, and what decides whether it may."""
