#include "products.h"

namespace fewbits::FEWBITS_ISA {

extern const Products products = {"products"};

}  // namespace fewbits::FEWBITS_ISA
