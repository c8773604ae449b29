# ruff: noqa: F403, F401
from plait.testing.case import *
from plait.testing.checks import *
from plait.testing.helpers import *
from plait.testing.processes import *
from tests.support import ROOT
