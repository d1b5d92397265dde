"""Channels between workers: values go straight from one program to another."""
