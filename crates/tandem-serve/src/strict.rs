//! JSON is taken for what it says: serde alone would also read a struct from an array, and the name of an enum's variant
//! from its number.
//!
//! The types say `#[serde(remote = "Self")]`, which makes serde's derived functions plain ones, and one of the macros here
//! calls these.

use serde::de::Visitor;
use serde::{Deserializer, forward_to_deserialize_any};

/// Reads an object, whatever is asked for.
pub(crate) struct ObjectOnly<D>(pub(crate) D);

impl<'de, D: Deserializer<'de>> Deserializer<'de> for ObjectOnly<D> {
    type Error = D::Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.0.deserialize_map(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

/// Implements `Deserialize` for structs, and `Serialize` too for those after a semicolon.
macro_rules! objects {
    ($($name:ident),+ $(; $($both:ident),+)?) => {
        $(impl<'de> serde::Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $name::deserialize($crate::strict::ObjectOnly(deserializer))
            }
        })+
        $($crate::strict::objects!($($both),+);
        $(impl serde::Serialize for $both {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                $both::serialize(self, serializer)
            }
        })+)?
    };
}
pub(crate) use objects;
