#define SETS 2
#include "decode_codes.inc"
