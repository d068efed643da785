// Arrays of an .npz file as numpy.savez writes it: a ZIP archive, not compressed, of .npy files in
// little-endian C order.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

struct Array {
  std::string type;  // as NumPy writes it: "<i4", "<f4"
  std::vector<int64_t> shape;
  std::vector<char> bytes;

  int64_t size() const {
    int64_t n = 1;
    for (int64_t extent : shape) n *= extent;
    return n;
  }
  template <class T>
  const T* as(const char* expected) const {
    if (type != expected)
      throw std::runtime_error("an array has type " + type + "; expected " + expected);
    return reinterpret_cast<const T*>(bytes.data());
  }
};

namespace npz {

template <class T>
T number(const std::vector<char>& file, size_t at) {
  if (at + sizeof(T) > file.size()) throw std::runtime_error("the .npz file is cut off");
  T value;
  std::memcpy(&value, file.data() + at, sizeof value);
  return value;
}

// The text between a key of the .npy header and the end of its value.
inline std::string entry(const std::string& header, const std::string& key, char first, char last) {
  const size_t start = header.find(first, header.find("'" + key + "':") + key.size() + 3);
  const size_t end = header.find(last, start + 1);
  if (start == std::string::npos || end == std::string::npos)
    throw std::runtime_error("an array's header has no " + key);
  return header.substr(start + 1, end - start - 1);
}

inline Array parse(const std::vector<char>& file, size_t start, size_t bytes) {
  const bool wide = number<uint8_t>(file, start + 6) > 1;
  const size_t header_bytes =
                   wide ? number<uint32_t>(file, start + 8) : number<uint16_t>(file, start + 8),
               data = start + (wide ? 12 : 10) + header_bytes;
  if (data > start + bytes || start + bytes > file.size())
    throw std::runtime_error("the .npz file is cut off");
  const std::string header(file.data() + data - header_bytes, header_bytes);
  if (header.find("'fortran_order': False") == std::string::npos)
    throw std::runtime_error("an array is not in C order; save numpy.ascontiguousarray of it");
  Array array;
  array.type = entry(header, "descr", '\'', '\'');
  const std::string extents = entry(header, "shape", '(', ')');
  for (size_t at = 0; (at = extents.find_first_of("0123456789", at)) != std::string::npos;
       at = extents.find_first_not_of("0123456789", at))
    array.shape.push_back(std::stoll(extents.substr(at)));
  array.bytes.assign(file.begin() + data, file.begin() + start + bytes);
  if (array.size() * (array.type.back() - '0') != static_cast<int64_t>(array.bytes.size()))
    throw std::runtime_error("an array has not the size of its shape");
  return array;
}

inline std::map<std::string, Array> read(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("cannot read " + path);
  const std::vector<char> file((std::istreambuf_iterator<char>(stream)), {});
  // The end of a ZIP archive says where its directory is; the directory says where its files are.
  size_t end = file.size() < 22 ? 0 : file.size() - 22;
  while (end > 0 && number<uint32_t>(file, end) != 0x06054b50) --end;
  if (end == 0) throw std::runtime_error(path + " is no .npz file");
  std::map<std::string, Array> arrays;
  size_t at = number<uint32_t>(file, end + 16);
  for (int left = number<uint16_t>(file, end + 10); left > 0; --left) {
    if (number<uint16_t>(file, at + 10) != 0)
      throw std::runtime_error(path + " is compressed; write it with numpy.savez");
    const uint32_t bytes = number<uint32_t>(file, at + 24), start = number<uint32_t>(file, at + 42);
    const uint16_t name = number<uint16_t>(file, at + 28), extra = number<uint16_t>(file, at + 30),
                   comment = number<uint16_t>(file, at + 32);
    if (at + 46 + name > file.size()) throw std::runtime_error("the .npz file is cut off");
    const std::string key(file.data() + at + 46, name);
    const size_t data =
        start + 30 + number<uint16_t>(file, start + 26) + number<uint16_t>(file, start + 28);
    arrays[key.substr(0, key.rfind(".npy"))] = parse(file, data, bytes);
    at += 46 + name + extra + comment;
  }
  return arrays;
}

}  // namespace npz
