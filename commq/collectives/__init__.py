"""Collectives: how bytes travel. They move rows of uint8 and know no formats."""
