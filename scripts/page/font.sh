#!/usr/bin/env bash
# Makes crates/tandem-serve/page/vendor/math.woff2 of TeX Gyre Termes Math: font.sh texgyretermes-math.otf
# (Debian: fonts-texgyre-math). Needs `pip install fonttools brotli`.
set -euo pipefail
characters="U+0020-007E,U+00A0,U+00AC,U+00B1,U+00B7,U+00D7,U+00F7,U+0131,U+0237,U+0300-030C,U+0338,U+0391-03C9,U+03D1,U+03D5"
characters+=",U+03D6,U+03F0,U+03F1,U+03F5,U+2016,U+2020,U+2021,U+2026,U+2032-2037,U+2044,U+2061-2064,U+20D6,U+20D7,U+20DB-20DC"
characters+=",U+210B-2115,U+211B-211D,U+2124,U+2128,U+212C-2133,U+2135-2138,U+2145-2149,U+2190-2199,U+21A6,U+21A9,U+21AA"
characters+=",U+21BC-21CC,U+21D0-21D5,U+21DD,U+2200-2269,U+226A-228B,U+228E-22A8,U+22B2-22B5,U+22C0-22C6,U+22C8-22D3,U+22EE-22F1"
characters+=",U+2308-230B,U+239B-23B3,U+23DC-23DF,U+25A1,U+25B3,U+25C7,U+25CB,U+2660-2663,U+266D-266F,U+27E8-27EB,U+27F5-27FF"
characters+=",U+2A00-2A06,U+2A0C,U+2A7D,U+2A7E,U+2AAF,U+2AB0,U+1D400-1D467,U+1D49C-1D4CF,U+1D504-1D56B,U+1D6A8-1D6E1,U+1D7CE-1D7E1"
pyftsubset "$1" --unicodes="$characters" --flavor=woff2 --layout-features="*" --no-hinting --desubroutinize \
    --output-file="$(dirname "$0")/../../crates/tandem-serve/page/vendor/math.woff2"
