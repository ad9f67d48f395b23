"""Behaviour of Capstan, room by room: unit, dist (several processes), store (a real S3 server)."""
