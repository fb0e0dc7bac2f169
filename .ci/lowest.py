"""Prints pip constraints: the lowest versions that setup.cfg promises to work with."""

import configparser
import re

config = configparser.ConfigParser()
config.read("setup.cfg")
listed = (
    config["options"]["install_requires"] + config["options.extras_require"]["test"]
)
for requirement in listed.split():
    print(re.sub(r"\[.*\]>=|>=", "==", requirement))
