// Written for this page: one query with answers from exact to none.
export const EXAMPLE = {
  query: "How do I reset my router without losing the settings?",
  documents: [
    "Hold the recessed button for ten seconds: this erases every setting and restores the factory state.",
    "To restart the router and keep its settings, unplug it, wait half a minute and plug it in again.",
    "Export the configuration to a file before any reset; after it, import the file under System, Backup.",
    "A router forwards packets between networks by looking up each destination in a table.",
    "The woodworking router is loud; wear ear protection and clamp the board.",
    "Our shop is open from nine to six, and on Saturdays until noon.",
  ],
};
