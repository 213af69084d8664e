// UTF-8, and what Unicode says of characters: categories, white space, words, NFC.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace mx {

constexpr char32_t kReplacement = 0xFFFD;

// The general categories in the order of the table; a set of them is a mask of 1 << category.
enum class Category : uint8_t {
    Lu, Ll, Lt, Lm, Lo, Mn, Mc, Me, Nd, Nl, No, Pc, Pd, Ps, Pe, Pi, Pf, Po,
    Sm, Sc, Sk, So, Zs, Zl, Zp, Cc, Cf, Cs, Co, Cn
};
constexpr int kCategories = 30;

Category category(char32_t c);

// The mask of a category ("Lu") or of all that begin with a letter ("L"); 0 for another name.
uint32_t category_mask(std::string_view name);

inline bool is_in(char32_t c, uint32_t mask) {
    return mask >> static_cast<int>(category(c)) & 1;
}

bool is_space(char32_t c);  // White_Space
bool is_word(char32_t c);   // \w: letters, marks, decimal digits, connectors

// Reads the character at `at` < text.size() and moves `at` behind it. Of what is not UTF-8 it reads
// the longest beginning of a character, or a byte, as U+FFFD, as Unicode recommends.
char32_t next_character(std::string_view text, size_t& at);

std::u32string to_characters(std::string_view text);
void append(std::string& text, char32_t c);
std::string to_utf8(std::u32string_view characters);
bool is_utf8(std::string_view text);

// Text with U+FFFD for whatever in `bytes` is not UTF-8.
std::string lossy(std::string_view bytes);

// Normalization form C.
std::string nfc(std::string_view text);

}  // namespace mx
