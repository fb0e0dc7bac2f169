"""The measurements that the README and the notes quote; each is a command."""
